"""Whether a server can be reached; the hubs' own clients try for half a minute."""

import urllib.error
import urllib.request

from huggingface_hub import constants

TIMEOUT_S = 5


def reachable(url: str) -> bool:
    """Whether the server answers within 5 seconds, be it with an error."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S)
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


def use_cache_if_offline() -> None:
    """Make Hugging Face's libraries use only their local cache if the hub cannot be reached."""
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)

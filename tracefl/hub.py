"""Is a server there? Clients of hubs retry for half a minute before they say that it is not."""

import urllib.error
import urllib.request

from huggingface_hub import constants

TIMEOUT_S = 5


def reachable(url: str) -> bool:
    """Does the server answer at all, within seconds?"""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def settle_hub() -> None:
    """Let Hugging Face's libraries work from their cache alone if the hub does not answer."""
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

"""The client's answer to the question which client it is. It needs Flower alone."""

from flwr.app import ConfigRecord, Context, Message, RecordDict

ACTION = "identify"  # of the client app's query
KEY = "partition-id"  # of the node's configuration, if the server asks for no other


def identify(message: Message, context: Context) -> Message:
    """Answer the server's question which client this node is.

    A client app registers it by `app.query("identify")(identify)`. The answer is what the node's
    configuration has under the key that the server asks for (`Recorder`'s `node_key`).

    Args:
        message: the server's, with the key that it asks for.
        context: of the node.

    Returns:
        A reply whose ConfigRecord has `client`, the node's id as a client.

    Raises:
        KeyError: the node's configuration has no such key.
    """
    key = str(message.content.config_records["config"].get("key", KEY)) if message.content.config_records else KEY
    if key not in context.node_config:
        there = ", ".join(sorted(context.node_config)) or "nothing"
        raise KeyError(f"this node's configuration has no {key!r}, it has {there}: name the key by node_key")
    return Message(RecordDict({"config": ConfigRecord({"client": str(context.node_config[key])})}), reply_to=message)

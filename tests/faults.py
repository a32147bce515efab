"""Faults for federations in memory: a grid between server and nodes in which things go wrong at a chosen moment."""

from flwr.app import Error, Message

from fedtune_strategies.protocol.records import from_record, to_record
from fedtune_strategies.testing import InMemoryGrid
from tests.federations import make_nodes


class FaultyGrid(InMemoryGrid):
    """A federation in which one node has one fault, the first time that it gets a task of a round.

    Parameters
    ----------
    settings, data_files
        As for `tests.federations.run`.
    fault : callable or None
        Called with (grid, node id, message) instead of the node; may use the methods below and returns
        what `answer` takes.
    round : int
        In which round; 0 for the first greeting.
    """

    def __init__(self, settings, data_files, fault=None, round=2, victim=1):
        self.workers = make_nodes(settings, data_files)
        super().__init__({number: worker.handle for number, worker in self.workers.items()})
        self._settings, self._data_files = settings, list(data_files.items())
        self._fault, self._round, self._victim = fault, round, victim
        self.looks = 0
        self.later = []
        self.dead = set()  # connected, but silent for good
        self.happened = 0

    def restart(self, number, new_id=None):
        """Replace a node's worker by one that holds the base model alone, perhaps under another id of Flower."""
        (self.workers[number],) = make_nodes(self._settings, dict([self._data_files[number - 1]])).values()
        self.nodes[new_id or number] = self.workers[number].handle

    def away(self, number, looks, new_id=None):
        """Take a node off for some looks of the server; then it is back."""
        self.nodes.pop(number, None)
        self.later.append((self.looks + looks, lambda: self.restart(number, new_id)))

    def train(self, number, message):
        """Let a node do a task; returns the reply's kind and bytes."""
        return self.workers[number].handle(*from_record(message.content))

    def get_node_ids(self):
        """Flower's list of those that are connected."""
        self.looks += 1
        for due, happen in [one for one in self.later if one[0] <= self.looks]:
            self.later.remove((due, happen))
            happen()
        return super().get_node_ids()

    def pull_messages(self, message_ids):
        """Let time go by, too: an exchange looks for replies alone."""
        self.get_node_ids()
        return super().pull_messages(message_ids)

    def _answer(self, message):
        number = message.metadata.dst_node_id
        round = int(message.metadata.group_id) if message.metadata.group_id.isdigit() else 0
        if self._fault is None or number != self._victim or round != self._round or self.happened:
            if number in self.dead:
                return self._reply(message)
            if number not in self.nodes:
                return self._reply(message, error=(5, "Node Unavailable"))
            return super()._answer(message)
        self.happened += 1
        return self._reply(message, **self._fault(self, number, message))

    def _reply(self, message, content=None, error=None, after=0):
        """Give a reply, an error, or nothing at all; `after` so many looks."""
        message_id = f"message-{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = message_id
        if error is not None:
            reply = Message(Error(code=error[0], reason=error[1]), reply_to=message)
        elif content is not None:
            reply = Message(to_record(*content), reply_to=message)
        else:
            return message_id
        if after:
            self.later.append((self.looks + after, lambda: self._replies.update({message_id: reply})))
        else:
            self._replies[message_id] = reply
        return message_id

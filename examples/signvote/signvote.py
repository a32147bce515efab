"""signSGD with majority vote (Bernstein et al., arXiv 1810.05291, algorithm 1) as a tuning method for FedTune.

A node sends the sign of its gradient, one byte a parameter; every parameter then moves by the step size the way that
most of the nodes point.
"""

import time
from dataclasses import dataclass

import torch

from fedtune_strategies.config import option, section
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedavg.strategy import ArraysStrategy
from fedtune_strategies.language.examples import batches
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.memory import peak_memory
from fedtune_strategies.method import Method
from fedtune_strategies.protocol.flower import decoded
from fedtune_strategies.protocol.messages import ArraysReply
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.strategy import check_origin


@dataclass(frozen=True)
class Settings:
    """The keys of the method, ``signvote.<key>``."""

    lr: float = option(1e-3, "Step of every parameter in a round.", above=0.0)


class SignVote(ArraysStrategy):
    """The server: count votes."""

    def __init__(self, config, base):
        super().__init__(config, base)
        self.lr = section(Settings, "signvote.", config.own).lr

    def accept(self, round, reply):
        """Take one byte a parameter, cast on the weights of this round."""
        check_origin(reply, round, fingerprint(self.current))
        if {name: (vote.dtype, vote.shape) for name, vote in reply.arrays.items()} != {
            name: (torch.int8, value.shape) for name, value in self.current.items()
        }:
            raise ProtocolError(f"{reply.node} sent something else than a vote for every parameter.")
        return True

    def aggregate_train(self, server_round, replies):
        """Move every parameter by the step size, the way of the majority; a tie leaves it."""
        answers = [decoded(reply.content, ArraysReply) for reply in replies]
        for name in self.current:
            votes = sum(answer.arrays[name].sign().to(torch.int32) for answer in answers)
            self.current[name] = self.current[name] - self.lr * votes.sign()
        return self.initial_arrays(), None


class Voter:
    """A node: the sign of the gradient over one batch."""

    def __init__(self, context):
        self.context = context
        self.parameters = {name: context.model.get_parameter(name) for name in context.base}

    def __call__(self, task):
        """Vote on one batch."""
        start, node = time.monotonic(), self.context
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(task.arrays[name])
        (batch,) = batches(node.examples, node.config.train.batch_size, 1, (task.round, node.name))
        loss = response_loss(node.model, batch)
        slopes = torch.autograd.grad(loss, list(self.parameters.values()))
        votes = {name: slope.sign().to(torch.int8) for name, slope in zip(self.parameters, slopes, strict=True)}
        return ArraysReply(
            node=node.name,
            round=task.round,
            arrays=votes,
            loss=loss.item(),
            skipped=0,
            fingerprint=fingerprint(task.arrays),
            num_examples=len(node.examples),
            seconds=time.monotonic() - start,
            peak_memory=peak_memory(),
        )


METHOD = Method(strategy=lambda config, model, base: SignVote(config, base), node=Voter)

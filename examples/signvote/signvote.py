"""signSGD with majority vote (Bernstein et al., arXiv 1810.05291, algorithm 1) as a tuning method for FedTune.

A node sends the sign of its gradient, one byte a parameter; every parameter then moves by the step size the way that
most of the nodes point.
"""

import time
from dataclasses import dataclass, field

import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg

from fedtune_strategies.config import Config, SamplingConfig, option
from fedtune_strategies.cost import HEADER, PROCESS, Cost
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedavg.messages import ArraysReply, ArraysTask
from fedtune_strategies.fedavg.strategy import ArraysStrategy
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.memory import private_peak
from fedtune_strategies.method import Method
from fedtune_strategies.protocol.flower import decoded
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.strategy import check_origin, mean_loss


@dataclass(frozen=True)
class SignVoteConfig:
    """The keys of the method, ``signvote.<key>``."""

    lr: float = option(1e-3, "Step of every parameter in a round.", above=0.0)


@dataclass(frozen=True)
class SignVoteRunConfig(Config):
    """A run: the sections that all methods share, a sample of the nodes, and the method's own."""

    strategy: SamplingConfig = field(default_factory=SamplingConfig)
    signvote: SignVoteConfig = field(default_factory=SignVoteConfig)


class SignVote(ArraysStrategy):
    """The server: count votes."""

    def __init__(self, config, base):
        super().__init__(config, base, FedAvg())
        self.lr = config.signvote.lr

    def step_size(self, settings):
        """Nodes take no steps of their own."""
        return 0.0

    def accept(self, round, reply):
        """Take one byte a parameter, cast on the weights of this round."""
        check_origin(reply, round, self.fingerprint)
        if {name: (vote.dtype, vote.shape) for name, vote in reply.arrays.items()} != {
            name: (torch.int8, value.shape) for name, value in self.current.items()
        }:
            raise ProtocolError(f"{reply.node} sent something else than a vote for every parameter.")
        return True

    def aggregate_train(self, server_round, replies):
        """Move every parameter by the step size, the way of the majority; a tie leaves it."""
        answers = sorted((decoded(reply.content, ArraysReply) for reply in replies), key=lambda answer: answer.node)
        for name in self.current:
            votes = sum(answer.arrays[name].sign().to(torch.int32) for answer in answers)
            self.current[name] = self.current[name] - self.lr * votes.sign()
        return self.initial_arrays(), MetricRecord(mean_loss(answers, [1.0] * len(answers)))


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
        (batch,) = node.batches(task.round, 1)
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
            peak_memory=private_peak(),
        )


def cost(config, shape, fleet):
    """Count a node's bytes: a byte a parameter up, all of it in float32 down, a gradient in memory."""
    tokens = config.train.batch_size * config.train.seq_length
    return Cost(
        memory=PROCESS + (shape.width + 8) * shape.parameters + shape.kept_activations(tokens, shape.layers),
        disk=shape.stored,
        up=shape.parameters + HEADER,
        down=4 * shape.parameters + HEADER,
        record=(fleet.nodes + 4) * shape.parameters,
    )


METHOD = Method(
    name="signvote",
    summary="the sign of the gradient, by majority vote",
    config=SignVoteRunConfig,
    strategy=lambda config, model, base: SignVote(config, base),
    client=Voter,
    leaves=lambda config: (
        "every round: one byte for each parameter, the sign of its slope on one batch of your data",
    ),
    messages=lambda: (ArraysTask, ArraysReply),
    cost=cost,
)

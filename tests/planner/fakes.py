"""Estimators simple enough to be worked out by hand, and jobs and fleets to plan."""

from __future__ import annotations

from orchestrator.chips.load import load_catalogue
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.fleet import Fleet, FleetEntry, resolve_fleets
from orchestrator.planner.job_plan import Request
from orchestrator.planner.quantity import given
from orchestrator.planner.search import Estimators
from orchestrator.planner.spec import (
    Cluster,
    JobSpec,
    MemoryEstimate,
    ModelShape,
    ParallelPlan,
    TimeEstimate,
)

LLAMA_8B = ModelShape("llama3_8b", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_70B = ModelShape("llama3_70b", 80, 8192, 28672, 64, 8, 128, 128256)
EXPERTS = ModelShape("experts", 16, 1024, 4096, 16, 4, 64, 32000, experts=32, experts_per_token=4, expert_dim=1024)


class Counted:
    """Estimators that count their calls; `seconds` of a step and `bytes_` of a device by the plan."""

    def __init__(self, seconds=None, bytes_=None, unknown=()):
        self.calls, self._unknown = 0, unknown
        self._seconds = seconds or (lambda job, plan: 1000.0 / plan.devices)
        self._bytes = bytes_ or (lambda job, plan: 16.0 * parameters(job.model) / plan.devices)

    def memory(self, job: JobSpec, cluster: Cluster, plan: ParallelPlan) -> MemoryEstimate:
        self.calls += 1
        return MemoryEstimate(self._bytes(job, plan), 0, 0, 0, 0, 0, 0, 80e9)

    def time(self, job: JobSpec, cluster: Cluster, plan: ParallelPlan) -> TimeEstimate:
        self.calls += 1
        assert plan.devices == cluster.devices, "the estimators get the chips that work"
        assert plan.micro_batches(job) > 0, "the batch divides over the plan"
        return TimeEstimate(self._seconds(job, plan), *[0.0] * 9, unknown=self._unknown)

    @property
    def estimators(self) -> Estimators:
        return Estimators(self.memory, self.time)


def fleet_of(text: str, **overrides: float) -> Fleet:
    return resolve_fleets([text], load_catalogue(), FleetEntry(**overrides))[0]


def request_of(shape: ModelShape = LLAMA_8B, tokens: float = 1e12, seq_len: int = 8192, **more) -> Request:
    return Request(JobSpec(shape, seq_len, 0, tokens), given("tokens", tokens, "tokens", "the test"), **more)

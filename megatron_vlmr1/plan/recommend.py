"""The quickest setting of so many devices that this program takes and that fits. No torch.

Settings are ordered by the step that is predicted for them, and their memory is counted in that order until the best
and the best in another layout are found. Of settings that a prediction cannot tell apart the plainest is taken. What is
refused is refused by the program's own rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_vlmr1.config import Config, ParallelConfig, RecomputeConfig, decoding_layout
from megatron_vlmr1.config.rules import check_cache, check_shares
from megatron_vlmr1.models import fp8
from megatron_vlmr1.plan import passes, search
from megatron_vlmr1.plan.costs import Device
from megatron_vlmr1.plan.hardware import Hardware
from megatron_vlmr1.plan.memory import RankMemory, rank_memory
from megatron_vlmr1.plan.search import Setting
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.plan.time import Program, StepTime, program, rollout_parts, step_time, training_task
from megatron_vlmr1.plan.workload import Workload

MARGIN = 0.1
"""Share of a device's memory that a plan leaves free: what an allocator cannot use, and what is not counted."""

ALIKE = 0.02
"""Settings whose steps differ by less are taken for equally quick."""

NO_MEMORY, NO_HOST = "does not fit the device", "does not fit the node's memory"


@dataclass(frozen=True)
class Choice:
    """A setting that the program takes and that fits."""

    setting: Setting
    time: StepTime
    memory: list[RankMemory]

    @property
    def peak(self) -> int:
        """Bytes of the fullest device."""
        return max(rank.worst()[1] for rank in self.memory)


@dataclass
class Recommendation:
    """What a search found.

    Attributes:
        choices: the best, and the best of another tensor or pipeline size; fewer where no more fit.
        settings: how many there were.
        refused: how many of them for which reason; those slower than the choices were not asked for their memory.
        faster: settings that would be quicker than any that fits.
        nearest: of what does not fit the setting that needs the least, and its bytes.
    """

    choices: list[Choice] = field(default_factory=list)
    settings: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faster: int = 0
    nearest: tuple[Setting, int] | None = None

    def note(self, setting: Setting, need: int) -> None:
        """Remember a setting that does not fit, if it needs less than the others."""
        if self.nearest is None or need < self.nearest[1]:
            self.nearest = setting, need


def room(hardware: Hardware) -> float:
    """Bytes of a device that a plan may fill."""
    return hardware.memory_bytes.value * (1 - MARGIN)


def misfit(memory: list[RankMemory], hardware: Hardware, per_node: int) -> str:
    """Return why ranks do not fit their devices or their node, in one line; "" if they do.

    A node is taken to hold ranks of the stage with the most in host memory, the stage's first among them.
    """
    rank = max(memory, key=lambda rank: rank.worst()[1])
    phase, count = rank.worst()
    if count > room(hardware):
        return (
            f"a rank of stage {rank.stage} needs {count / 1e9:.1f} GB in the phase {phase}, more than "
            f"{room(hardware) / 1e9:.1f} GB ({hardware.memory_bytes.value / 1e9:.0f} GB of {hardware.name} less "
            f"{MARGIN:.0%})"
        )
    host = max(rank.node_host(per_node) for rank in memory)
    if host > hardware.host_memory_bytes.value:
        return (
            f"the ranks of a node need {host / 1e9:.0f} GB of host memory, more than its "
            f"{hardware.host_memory_bytes.value / 1e9:.0f} GB"
        )
    return ""


def check(cfg: Config, shape: PlanShape, world: int) -> None:
    """Refuse what the program refuses when it starts, but for files.

    Raises:
        ValueError: one line that names the key.
    """
    shape.check_layout(cfg.parallel)
    copies = cfg.parallel.data_parallel_size(world)
    cfg.recompute.check(cfg.parallel.layers_by_chunk(shape.text.num_layers))
    check_shares(cfg, copies)
    if cfg.method == "grpo":
        if (layout := decoding_layout(cfg)) is not None:
            shape.check_layout(layout)
        check_cache(cfg)


def recommend(cfg: Config, shape: PlanShape, hardware: Hardware, world: int, work: Workload) -> Recommendation:
    """Search all settings of `world` devices."""
    found = Recommendation()
    planner = _Planner(cfg, shape, hardware, world, work)
    ordered = sorted(planner.timed(found), key=lambda pair: pair[0])
    quickest = _first(ordered, planner, found, count=True)
    if quickest is None:
        return found
    for _ in range(2):
        if quickest is not None:
            limit = quickest[0] * (1 + ALIKE)
            alike = [pair for pair in ordered if quickest[0] <= pair[0] <= limit]
            plainest = _first(sorted(alike, key=lambda pair: (_complexity(pair[1]), pair[0])), planner, found)
            assert plainest is not None
            found.choices.append(planner.choice(plainest[1]))
            ordered = [pair for pair in ordered if _layout(pair[1])[:2] != _layout(plainest[1])[:2]]
            quickest = _first(ordered, planner, found)
    return found


def _first(
    ordered: Iterable[tuple[float, Setting]], planner: _Planner, found: Recommendation, count: bool = False
) -> tuple[float, Setting] | None:
    """Return the first setting that fits; count those before it, if asked to, and remember which needs the least."""
    for seconds, setting in ordered:
        memory = planner.memory(setting)
        problem = misfit(memory, planner.hardware, planner.per_node)
        if not problem:
            return seconds, setting
        if count:
            found.faster += 1
            found.refused[NO_HOST if problem.startswith("the ranks of a node") else NO_MEMORY] += 1
            found.note(setting, max(rank.worst()[1] for rank in memory))
    return None


def _complexity(setting: Setting) -> int:
    """Return how much a setting asks a reader to understand."""
    parallel = setting.parallel
    uneven, virtual = parallel.pipeline_layers is not None, parallel.virtual_pipeline_model_parallel_size > 1
    return 2 * uneven + virtual + (parallel.pipeline_model_parallel_size > 1) + (setting.decoding is not None)


class _Planner:
    """Times and memory of settings; parts that settings have in common are computed once."""

    def __init__(self, cfg: Config, shape: PlanShape, hardware: Hardware, world: int, work: Workload) -> None:
        self.cfg, self.shape, self.hardware, self.world, self.work = cfg, shape, hardware, world, work
        self.per_node = min(world, hardware.devices_per_node)
        self._device = Device(hardware, cfg.precision.products)
        self._failed: dict[object, list[RankMemory]] = {}
        self._tensor: dict[int, str] = {}

    def timed(self, found: Recommendation) -> Iterator[tuple[float, Setting]]:
        """Yield (seconds, setting) of what the program takes; count what it refuses."""
        cfg, text = self.cfg, self.shape.text
        recomputes = search.recomputes(cfg, self.shape)
        budgets = sorted({*search.MICRO_BATCH_TOKENS, cfg.train.micro_batch_tokens})
        per_node = self.hardware.devices_per_node
        for parallel, copies in search.layouts(cfg, text, self.world, per_node):
            kinds: list[tuple[int, int] | None] = [None]
            if cfg.method == "grpo":
                kinds = list(search.decodings(text, parallel, per_node))
            number = len(kinds) * len(budgets) * len(recomputes)
            found.settings += number
            problem = self._problem(parallel, copies, found)
            if problem:
                found.refused[problem] += number
                continue
            rollouts = list(self._rollouts(parallel, kinds, found, len(budgets) * len(recomputes)))
            trainings = list(self._trainings(parallel, budgets, recomputes))
            found.settings -= (len(budgets) * len(recomputes) - len(trainings)) * len(rollouts)
            for rollout_s, decoding in rollouts:
                for training_s, budget, recompute in trainings:
                    setting = Setting(parallel, budget, recompute, decoding, search.lanes(cfg, copies))
                    yield rollout_s + training_s, setting

    def _problem(self, parallel: ParallelConfig, copies: int, found: Recommendation) -> str:
        """Return the first rule that a layout breaks, without its numbers; "" for none."""
        if problem := self._tensor_problem(parallel.tensor_model_parallel_size):
            return problem
        try:
            fp8.check(self.cfg.model_copy(update={"parallel": parallel}), self.shape.text)
        except ValueError:
            return "FP8 does not fit the matrices of a rank, the micro-batches or the layers of a stage"
        if self.cfg.train.prompts_per_step % copies:
            return f"train.prompts_per_step={self.cfg.train.prompts_per_step} is not a multiple of the copies"
        return self._static_misfit(parallel, copies, found)

    def _tensor_problem(self, tp: int) -> str:
        """Return why a tensor-parallel size does not go; layers are always cut so that they do."""
        if tp not in self._tensor:
            self._tensor[tp] = ""
            try:
                self.shape.check_layout(ParallelConfig(tensor_model_parallel_size=tp))
            except ValueError:
                heads = self.shape.text.num_heads % tp != 0
                kv = "tensor parallelism and key/value heads: neither divides the other"
                self._tensor[tp] = "tensor parallelism does not divide the heads" if heads else kv
        return self._tensor[tp]

    def _static_misfit(self, parallel: ParallelConfig, copies: int, found: Recommendation) -> str:
        """Refuse by weights, gradients and optimizer state alone, which no setting of a layout changes."""
        lanes = search.lanes(self.cfg, copies)
        setting = Setting(parallel, self.cfg.train.micro_batch_tokens, self.cfg.recompute, None, lanes)
        place, item = self._program(setting).place, self._device.item
        most = 0.0
        for stage in range(place.pp):
            language, tower = passes.stage_parameters(self.shape, place, stage)
            trained = language + (0 if self.cfg.model.freeze_vision else tower)
            state = trained * (8 + 4 * (item < 4)) / copies
            most = max(most, (language + tower) * item + trained * 4 + state)
        if most <= room(self.hardware):
            return ""
        found.note(setting, int(most))
        return f"{NO_MEMORY} by weights, gradients and optimizer state alone"

    def _rollouts(
        self, parallel: ParallelConfig, kinds: list[tuple[int, int] | None], found: Recommendation, times: int
    ) -> Iterator[tuple[float, tuple[int, int] | None]]:
        for decoding in kinds:
            cfg = Setting(parallel, 1 << 40, RecomputeConfig(), decoding, 1).of(self.cfg)
            if cfg.method != "grpo":
                yield 0.0, None
                continue
            try:
                if (layout := decoding_layout(cfg)) is not None:
                    self.shape.check_layout(layout)
                check_cache(cfg)
                how = program(cfg, self.shape.text.num_layers, self.world, self.hardware.devices_per_node)
                parts = rollout_parts(self.hardware, self.shape, how, self.work)
            except ValueError as error:
                cache = "max_cache_tokens" in str(error)
                found.refused[f"generation {'has too small a cache' if cache else 'does not divide'}"] += times
                continue
            yield sum(cost.seconds for cost in parts.values()), decoding

    def _trainings(
        self, parallel: ParallelConfig, budgets: list[int], recomputes: list[RecomputeConfig]
    ) -> Iterator[tuple[float, int, RecomputeConfig]]:
        """Yield (seconds, tokens of a micro-batch, recompute); larger budgets that pack alike are left out."""
        seen = set()
        for budget in budgets:
            for recompute in recomputes:
                how = self._program(Setting(parallel, budget, recompute, None, 1))
                task = training_task(self._device, self.shape, how, self.work)
                key = (task.batch, recompute.granularity, str(recompute.modules), recompute.tower)
                if key not in seen:
                    seen.add(key)
                    yield self._training_seconds(how), budget, recompute

    def _training_seconds(self, how: Program) -> float:
        phases = step_time(self.hardware, self.shape, how, self.work, rollout=False).phases
        return sum(cost.seconds for cost in phases.values())

    def _program(self, setting: Setting) -> Program:
        per_node = self.hardware.devices_per_node
        return program(setting.of(self.cfg), self.shape.text.num_layers, self.world, per_node)

    def choice(self, setting: Setting) -> Choice:
        """Return a setting with its whole step and its memory."""
        return Choice(
            setting, step_time(self.hardware, self.shape, self._program(setting), self.work), self.memory(setting)
        )

    def memory(self, setting: Setting) -> list[RankMemory]:
        """Return what the ranks hold, or would hold in another setting that fails for the same reason.

        Training's phases depend on whether a copy generates (it keeps its own embeddings) and not on which, nor the
        rollout on what is computed again, nor host memory on either.
        """
        layout, budget = _layout(setting), setting.micro_batch_tokens
        rollout = (layout, budget, setting.decoding)
        training = (layout, budget, str(setting.recompute), setting.decoding is None)
        for key in (layout, rollout, training):
            if key in self._failed:
                return self._failed[key]
        memory = rank_memory(setting.of(self.cfg), self.shape, self.world, self.hardware.device)
        phase, count = max((rank.worst() for rank in memory), key=lambda worst: worst[1])
        if count > room(self.hardware):
            self._failed[rollout if phase == "rollout" else training] = memory
        elif misfit(memory, self.hardware, self.per_node):
            self._failed[layout] = memory
        return memory


def _layout(setting: Setting) -> tuple[int, int, int]:
    p = setting.parallel
    return (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size)

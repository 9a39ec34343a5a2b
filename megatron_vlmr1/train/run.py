"""What both loops stand on: the run directory, the actor, the judges, resume, and what follows each step."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory, weights_sha256
from megatron_vlmr1.config import Config
from megatron_vlmr1.config.rules import check_shares
from megatron_vlmr1.data.cache import open_cache
from megatron_vlmr1.data.feed import Feed, truncate_ledger
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.rollouts import first_position
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.errors import REQUEUE, RunStopped
from megatron_vlmr1.evaluate import split
from megatron_vlmr1.grpo.reference import Reference
from megatron_vlmr1.grpo.update import Updater
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rewards import tasks
from megatron_vlmr1.rewards.judges import judges
from megatron_vlmr1.rollout.actor import Actor
from megatron_vlmr1.runtime import device, distributed, lock
from megatron_vlmr1.runtime.signals import StopFlag
from megatron_vlmr1.runtime.time_limit import TimeLimit
from megatron_vlmr1.telemetry import console
from megatron_vlmr1.telemetry.files import write_or_warn
from megatron_vlmr1.telemetry.flops import peak_flops, utilisation
from megatron_vlmr1.telemetry.metrics import MetricsWriter
from megatron_vlmr1.telemetry.progress import here
from megatron_vlmr1.telemetry.prometheus import PrometheusEndpoint
from megatron_vlmr1.telemetry.spikes import Spikes
from megatron_vlmr1.telemetry.timers import PhaseTimers
from megatron_vlmr1.telemetry.wandb_sink import WandbSink
from megatron_vlmr1.train import loader
from megatron_vlmr1.train.checkpoints import Checkpoints
from megatron_vlmr1.train.peaks import Peaks
from megatron_vlmr1.train.stragglers import Stragglers
from megatron_vlmr1.train.watch import Watch


class Run:
    """One training run on this rank."""

    def __init__(
        self, cfg: Config, mesh: Mesh, stop: StopFlag, stack: ExitStack, allow_config_change: bool = False
    ) -> None:
        """Check the data, load the model, start the judges; `stack` ends what was started.

        Raises:
            ValueError: the user's input does not fit together; one line.
        """
        self.cfg, self.mesh, self.stop = cfg, mesh, stop
        self.step = 0
        self.limit = TimeLimit(cfg.train.exit_before)
        self.stragglers = Stragglers(mesh.world)
        stack.push(self._tell_step)
        self.run_dir = Path(cfg.run_dir)
        self._lock(stack)
        self.task = tasks.get(cfg.task)
        remote = open_cache(cfg.data)
        self.shards = Mixture.open(cfg.data.sources, remote)
        self.splits = {name: ShardSet.open(path, remote) for name, path in cfg.data.evaluate.items()}
        self.checkpoints = Checkpoints(cfg, mesh, allow_config_change)
        stack.push(self._end_saving)
        resumed = self.checkpoints.newest()
        source = hf_directory(cfg.model.path, check=mesh.rank == 0)
        self.actor = Actor(source, cfg, mesh)
        self.reference = self._load_reference(source)
        if resumed:
            self.actor.load_weights(resumed / "hf")
        ddp = self.actor.policy.wrap_for_training()
        self.optimizer = parallel_optimizer.build(cfg.optimizer, ddp)
        self.updater = Updater(self.actor.policy, self.optimizer, cfg)
        progress = self.checkpoints.restore(self.actor, self.optimizer, resumed) if resumed else {}
        self._check_same_data(progress)
        self.weights_sha256 = self._pinned_weights(source, progress)
        self.step = int(progress.get("step", cfg.debug.first_step))
        self.updater.bad_steps = int(progress.get("bad_steps", 0))
        self.updater.replicas.remember()
        self.updater.replicas.check(always=True)
        self.spikes = Spikes(cfg.train.spike_factor, cfg.train.spike_window, progress.get("recent"))
        self.feed = self._feed(int(progress.get("consumed_samples", self._first_position())), stack)
        self.feed.skipped = int(progress.get("skipped", 0)) if mesh.dp_rank == 0 else 0  # the sum of all ranks
        asks, timeout_s, serve = self.actor.engine.speaks, cfg.parallel.timeout_s, not self.replays
        family = self.actor.policy.shape.family
        self.judges = stack.enter_context(
            judges(cfg.rewards, cfg.task, mesh, asks, self.log_dir, timeout_s, family, serve)
        )
        gpu = device.has_cuda()
        self.timers = PhaseTimers(
            torch.cuda.synchronize if gpu else None, peak_bytes=device.peak_bytes if gpu else None
        )
        self.peaks = Peaks(cfg, self.actor.directory, mesh.world, self.timers)
        self.watch = Watch(cfg, mesh.rank, self.timers, stack)
        self.metrics = MetricsWriter(self.run_dir, self._wandb(), self._prometheus()) if mesh.rank == 0 else None
        if self.metrics is not None:
            stack.callback(self.metrics.close)
            self.metrics.truncate_after(self.step)
            write_or_warn(self.run_dir / "config.yaml", config.dump(cfg).encode())
        here.begin(self.step)
        self.limit.ready()
        self.watch.begin(self.step)
        self._started = time.perf_counter()

    def _tell_step(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Let an end of the run say after how many steps it came, wherever it was raised."""
        if isinstance(error, RunStopped) and error.step is None:
            error.step = self.step

    def _end_saving(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Wait for a checkpoint that is under way where all ranks stop together."""
        if isinstance(error, RunStopped):
            self.checkpoints.close()

    def _lock(self, stack: ExitStack) -> None:
        problem = ""
        if self.mesh.rank == 0:
            try:
                stack.enter_context(lock.held(self.run_dir))
            except (OSError, ValueError) as error:
                problem = str(error)
        if problem := distributed.broadcast_text(problem):
            raise ValueError(problem)

    def _wandb(self) -> WandbSink | None:
        project = self.cfg.telemetry.wandb_project
        return WandbSink(project, self.run_dir, self.cfg.model_dump(mode="json")) if project else None

    def _prometheus(self) -> PrometheusEndpoint | None:
        at = self.cfg.telemetry
        if at.prometheus_port is None:
            return None
        return PrometheusEndpoint(at.prometheus_host, at.prometheus_port, self.run_dir.name)

    @property
    def replays(self) -> bool:
        """Whether completions and scores come from a saved rollout."""
        return self.cfg.debug.replay_rollouts is not None

    @property
    def log_dir(self) -> Path:
        """Where this attempt's logs and its outcome go."""
        return Path(os.environ["VLMR1_LOG_DIR"])

    def after_step(self, step: int, metrics: dict[str, float]) -> bool:
        """Log, evaluate, save; return whether to stop because a signal or the time asks for it. `step` is from 0."""
        cfg = self.cfg.train
        self.step = step + 1
        self.updater.replicas.check()  # before anything is generated from what the step left
        last = self.step == cfg.steps
        here.step = self.step
        stopping = distributed.any_rank(self._should_stop())
        if self._due(cfg.evaluate_every) and not stopping:
            with self.timers("evaluate"):
                metrics |= self.evaluate()
            self.limit.note_evaluation(self.timers.seconds("evaluate"))
        now = time.perf_counter()
        metrics |= self.timers.take() | {"perf/step_s": now - self._started, "data/consumed": self.feed.consumed}
        metrics |= self.peaks.take()
        metrics |= self.stragglers.compare(metrics, here.take_waits(), metrics["perf/step_s"])
        metrics |= self._rates(metrics) | self.watch.end(step)
        metrics["checkpoint/save_failures"] = self.checkpoints.failures
        metrics |= self.spikes.flags(step, metrics)
        self._started = now
        if self.metrics is not None:
            self.metrics.write(step, metrics)
            console.print_line(step, cfg.steps, metrics)
        # After the metrics, so that a checkpoint's steps are all on record; its time counts in the next step.
        save = last or stopping or self._due(cfg.save_every)
        if save or self.checkpoints.under_way:
            with self.timers("save_exposed"):
                self.checkpoints.poll()
                if save:
                    self._save(metrics, last, wait=last or stopping)
        if not (last or stopping):
            self.watch.begin(self.step)
        return stopping and not last

    def _should_stop(self) -> bool:
        """Whether this rank has had a signal, or sees that another step would end too late.

        Before that step come this one's evaluation and save, or the rest of a save that is under way; none if it stops.
        """
        step_s = time.perf_counter() - self._started - self.timers.seconds("save_exposed")
        self.limit.note(step_s, self.checkpoints.save_s)
        saves = self.checkpoints.under_way or self._due(self.cfg.train.save_every)
        evaluates = self._due(self.cfg.train.evaluate_every)
        return self.stop.requested is not None or self.limit.is_near(evaluates, saves)

    def _due(self, every: int) -> bool:
        """Whether what comes every so many steps, 0 never, comes after this one."""
        return bool(every) and self.step % every == 0

    def _save(self, metrics: dict[str, float], last: bool, wait: bool) -> None:
        """Save; the last checkpoint of an attempt is tried again until it is there or the run stops itself."""
        self.updater.check_state(always=True)
        args = self.actor, self.optimizer, self._progress(int(metrics["data/skipped"])), metrics, last, wait
        while not self.checkpoints.save(*args) and wait:
            continue
        self.updater.offload.after_step()

    def _rates(self, metrics: dict[str, float]) -> dict[str, float]:
        """FLOPs and trained tokens per second and rank, over the step; generated tokens per second of rollout."""
        aside = metrics.get("time/evaluate", 0.0) + metrics.get("time/save_exposed", 0.0)
        seconds, world = metrics["perf/step_s"] - aside, self.mesh.world
        peak = peak_flops(device.name(), self.cfg.precision.products)
        rates = utilisation(metrics["perf/lm_flops"], metrics["perf/vit_flops"], seconds, world, peak)
        rates["perf/tokens_per_s_per_gpu"] = metrics.get("train/tokens", 0.0) / seconds / world
        if "rollout/tokens" in metrics and not self.replays:
            rates["rollout/tokens_per_s"] = metrics["rollout/tokens"] / max(1e-9, metrics["time/rollout"])
        return rates

    def evaluate(self) -> dict[str, float]:
        """Evaluate every split; return ``evaluate/SPLIT/FIGURE``."""
        out: dict[str, float] = {}
        self.updater.offload.before_generation()
        for name, shards in self.splits.items():
            figures = split.evaluate(self.actor, self.judges, shards, self.cfg, self.mesh).figures
            out |= {f"evaluate/{name}/{figure}": value for figure, value in figures.items()}
        self.actor.engine.release()
        return out

    def write_facts(self) -> None:
        """Write ``facts.json``: who took part, and what was read; all ranks call it at the end of training."""
        pids = distributed.every_row(torch.tensor([os.getpid()]))[:, 0].tolist()
        read = {name for r in range(self.mesh.world) for name in self._shards_read_by(r)}
        if self.mesh.rank != 0:
            return
        stats = self.judges.stats()
        facts = {
            "parallel": self.mesh.describe(),
            "adam": parallel_optimizer.adam(self.optimizer),
            "versions": {name: version(name) for name in ("megatron-core", "torch", "transformers")},
            "rank_pids": pids,
            "reward_pids": [stats["service_pid"], *stats["worker_pids"]] if stats else [],
            "scored": stats.get("scored", 0),
            "shards_read": sorted(read),
            "data_sha256": self.shards.digest(),
            "config_changes": self.checkpoints.config_changes,
            **self.weights_sha256,
        }
        write_or_warn(self.run_dir / "facts.json", (json.dumps(facts, indent=1) + "\n").encode())

    def _shards_read_by(self, rank: int) -> list[str]:
        text = distributed.broadcast_text("\n".join(sorted(self.shards.shards_read)), rank)
        return [name for name in text.split("\n") if name]

    def _progress(self, skipped: int) -> dict[str, Any]:
        """Return what a resumed run goes on from; `skipped` samples were lost so far, on all ranks."""
        return {
            "step": self.step,
            "consumed_samples": self.feed.consumed,
            "bad_steps": self.updater.bad_steps,
            "recent": self.spikes.recent,
            "skipped": skipped,
            "layer_spec": self.actor.policy.layers.spec,
            "data_sha256": self.shards.digest(),
            **self.weights_sha256,
            "config": self.cfg.model_dump(mode="json"),
        }

    def _load_reference(self, source: Path) -> Reference | None:
        cfg = self.cfg
        if cfg.method != "grpo" or cfg.grpo.beta == 0:
            return None
        if cfg.model.reference_path is not None:
            self.actor.load_weights(hf_directory(cfg.model.reference_path, check=self.mesh.rank == 0))
        reference = Reference(self.actor.policy)
        if cfg.model.reference_path is not None:
            self.actor.load_weights(source)
        return reference

    def _pinned_weights(self, source: Path, progress: dict[str, Any]) -> dict[str, str]:
        """Return the sha256 of the weights that the run was started from, and of its reference's if it has one.

        Files are read at the start, and again where a resumed run takes its reference from them.

        Raises:
            ValueError: a resumed run's reference has other weights; on all ranks.
        """
        pinned: dict[str, str] = {key: progress[key] for key in ("base_sha256", "reference_sha256") if key in progress}
        problem = ""
        if self.mesh.rank == 0:
            path = self.cfg.model.reference_path
            if "base_sha256" not in pinned:
                pinned["base_sha256"] = weights_sha256(source)
            if self.reference is not None:
                fresh = path is None and "base_sha256" not in progress
                now = pinned["base_sha256"] if fresh else weights_sha256(hf_directory(path or source, check=False))
                if pinned.setdefault("reference_sha256", now) != now:
                    name = "model.path" if path is None else "model.reference_path"
                    problem = (
                        f"{name}={path or self.cfg.model.path}: not the weights that {self.run_dir} was started with"
                    )
        if problem := distributed.broadcast_text(problem):
            raise ValueError(problem)
        return dict(json.loads(distributed.broadcast_text(json.dumps(pinned))))

    def _check_same_data(self, progress: dict[str, Any]) -> None:
        if progress.get("data_sha256", self.shards.digest()) != self.shards.digest():
            raise ValueError(
                f"{', '.join(path for path, _ in self.cfg.data.sources)}: not the data that {self.run_dir} was started "
                "with; use another run_dir"
            )

    def _first_position(self) -> int:
        """Return where in the data `debug.first_step` begins; 0 for step 0."""
        cfg = self.cfg
        if cfg.debug.first_step and cfg.debug.replay_rollouts is not None:
            return first_position(Path(cfg.debug.replay_rollouts), cfg.debug.first_step)
        return cfg.debug.first_step * cfg.train.prompts_per_step

    def _feed(self, consumed: int, stack: ExitStack) -> Feed:
        cfg, mesh = self.cfg, self.mesh
        check_shares(cfg, mesh.dp_size)
        stream = Stream(
            self.shards, cfg.seed, cfg.data.lanes, cfg.data.shuffle_window, mesh.dp_rank, mesh.dp_size, consumed
        )
        ledger = self.run_dir / "ledger" / f"rank_{mesh.dp_rank}.jsonl" if mesh.is_model_leader else None
        distributed.together(lambda: truncate_ledger(self.run_dir / "ledger", consumed), only_first=True)
        builder = self.actor.prompt_builder(self.task.render)
        reader = loader.reader(stream, builder, cfg, self.actor.directory)
        stack.callback(reader.close)
        return Feed(stream, reader, mesh, ledger, cfg.data.long_prompts == "error")


def requeue(run: Run) -> RunStopped:
    """Return what a loop raises after it has saved because of a signal or the time limit."""
    cause = run.stop.requested or run.limit.reason or "a signal to another rank, or its time limit"
    reason = f"checkpointed at step {run.step} on {cause}"
    return RunStopped(REQUEUE, reason, run.step)

"""The policy: one copy of the weights for generation and training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_vlmr1.config import RecomputeConfig
from megatron_vlmr1.models.logprobs import Vocabulary, token_logprobs
from megatron_vlmr1.models.shape import VlmShape, padded
from megatron_vlmr1.models.specs import Layers
from megatron_vlmr1.models.vlm import VlmModel, build_chunks, encode_images, gather_hidden
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.parallel.overlap import DataParallel
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import ImagePatches


class Policy:
    """A model on its mesh, what it may not say, and the image embeddings of the current step."""

    def __init__(
        self,
        shape: VlmShape,
        mesh: Mesh,
        dtype: torch.dtype,
        banned: Sequence[int],
        freeze_vision: bool = False,
        recompute: RecomputeConfig | None = None,
        layers: Layers | None = None,
    ) -> None:
        """Build the model without its weights.

        `banned` are token ids that can never be produced: vision and padding tokens; `recompute` None keeps all
        activations; `layers` None are those of the torch spec.

        Raises:
            ValueError: the model cannot be cut as the mesh's layout says.
        """
        self.shape, self.mesh, self.freeze_vision = shape, mesh, freeze_vision
        self.layers = layers or Layers()
        self._gathering = False  # parameters, of which some may still be old
        self._chunks = build_chunks(shape, mesh, dtype, recompute or RecomputeConfig(), self.layers)
        if freeze_vision and self.chunks[0].vision is not None:
            self.chunks[0].vision.requires_grad_(False)
        rows = padded(shape.text.vocab_size, mesh.tp_size) // mesh.tp_size
        self.vocabulary = Vocabulary(rows, shape.text.vocab_size, banned, mesh.tp_group, device.device())
        self.ddp: list[DataParallel] = []
        self.version = 0  # of the weights
        self._features: dict[bytes, torch.Tensor] = {}

    @property
    def chunks(self) -> list[VlmModel]:
        """This stage's chunks, in the order in which a token meets them; their parameters are whole."""
        self.settle()
        return self._chunks

    def gather_parameters(self) -> None:
        """Begin to gather what an optimizer step has changed, where that is not done within the step."""
        self._gathering = any([chunk.gather() for chunk in self.ddp])

    def settle(self) -> None:
        """Wait until all parameters have arrived."""
        if self._gathering:
            for chunk in self.ddp:
                chunk.settle()
            self._gathering = False

    @property
    def model(self) -> VlmModel:
        """The only chunk of a stage without virtual stages."""
        (only,) = self.chunks
        return only

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of all chunks on this rank, in a fixed order."""
        for chunk in self.chunks:
            yield from chunk.parameters()

    def wrap_for_training(self) -> list[DataParallel]:
        """Give the parameters gradient buffers, chunk by chunk. Call after the weights are loaded."""
        self.ddp = parallel_optimizer.wrap(self.chunks, self.mesh)
        return self.ddp

    def features(self, images: Sequence[ImagePatches]) -> tuple[torch.Tensor, ...] | None:
        """Return embeddings that may be reused until `forget_features`; None where the tower must run with gradients.

        Without gradients, and for a frozen tower always, each unique image goes through the tower once.
        """
        if not self.mesh.is_first_stage or (torch.is_grad_enabled() and not self.freeze_vision):
            return None
        new = {image.digest: image for image in images if image.digest not in self._features}
        if new:
            # Not tensors of inference mode, in which a rollout asks: training passes may reuse them.
            with torch.inference_mode(False), torch.no_grad():
                rows = encode_images(self.chunks[0], tuple(new.values()))
            self._features.update(zip(new, rows, strict=True))
        return tuple(self._features[image.digest] for image in images)

    def weights_changed(self, tower: bool) -> None:
        """Say that the weights are others than before, those of the tower among them or not."""
        self.version += 1
        if tower:
            self.forget_features()

    def forget_features(self) -> None:
        """Drop image embeddings; to be called after each step."""
        self._features.clear()

    def output_weight(self) -> torch.Tensor:
        """Return this rank's rows of the output layer; last stage only."""
        return self.chunks[-1].output_weight()

    def logprobs(
        self, hidden: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs [n] of `labels` predicted at `rows`, and entropies [n]; last stage only."""
        picked = gather_hidden(self.chunks[-1], hidden).index_select(0, rows)
        return token_logprobs(picked, self.output_weight(), labels, self.vocabulary)

"""A vision-language model on megatron-core: images shared out, language model tensor- and pipeline-parallel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule

from megatron_vlmr1.config import RecomputeConfig
from megatron_vlmr1.models.attention import Attend, PackedAttention
from megatron_vlmr1.models.layers import transformer_config
from megatron_vlmr1.models.shape import VlmShape, padded
from megatron_vlmr1.models.specs import Layers, block_spec
from megatron_vlmr1.models.vision import VisionTower, encode
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.types import ImagePatches


@dataclass(frozen=True)
class ModelInput:
    """One packed row. T is a multiple of the tensor-parallel size under sequence parallelism."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [3, T], M-RoPE
    attend: Attend
    images: tuple[ImagePatches, ...] = ()  # each unique image once
    image_rows: torch.Tensor | None = None  # [M], rows of the pack that image tokens fill
    image_order: tuple[int, ...] = field(default=())  # which image fills the next rows, in order of rows
    features: tuple[torch.Tensor, ...] | None = None  # embeddings of `images`, when the tower has already run


class _LanguageModel(GPTModel):
    """GPTModel that stops at the last hidden state: log-probs are computed in chunks, elsewhere."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class VlmModel(MegatronModule):
    """One chunk of the model. The first holds the tower; the last returns normed hidden states.

    A pipeline stage has one chunk, or several (virtual stages): chunk `vp_stage` of every stage comes before chunk
    `vp_stage` + 1 of any.
    """

    def __init__(
        self,
        shape: VlmShape,
        mesh: Mesh,
        dtype: torch.dtype,
        vp_stage: int,
        recompute: RecomputeConfig,
        layers: Layers | None = None,
    ) -> None:
        layers = layers or Layers()
        config = transformer_config(shape.text, mesh, dtype, recompute, layers.precision, layers.spec)
        super().__init__(config=config)
        self.shape, self.mesh, self.dtype = shape, mesh, dtype
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage if mesh.vp_size > 1 else None
        self.pre_process = mesh.is_first_stage and vp_stage == 0
        self.post_process = mesh.is_last_stage and vp_stage == mesh.vp_size - 1
        self.share_embeddings_and_output_weights = shape.text.tied
        self.vision = VisionTower(config, shape.vision, dtype, recompute.tower) if self.pre_process else None
        self.language = _LanguageModel(
            config,
            block_spec(
                mesh.layout.layers_by_chunk(shape.text.num_layers)[vp_stage * mesh.pp_size + mesh.pp_rank], layers.spec
            ),
            vocab_size=padded(shape.text.vocab_size, mesh.tp_size),
            max_sequence_length=shape.text.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=shape.text.tied,
            position_embedding_type="mrope",
            rotary_base=shape.text.rope_theta,  # type: ignore[arg-type]  # a float serves as well
            scatter_embedding_sequence_parallel=False,  # image embeddings are merged in before the scatter
            pg_collection=mesh.groups,
            vp_stage=self.vp_stage,
        )
        _mark_parallel_parameters(self.language)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's output (called by the pipeline schedule)."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """Return the weight that a tied model's first and last stage share (called by megatron-core)."""
        return self.language.shared_embedding_or_output_weight()

    def output_weight(self) -> torch.Tensor:
        """Return this rank's rows [padded vocabulary / tp, hidden] of the output layer; last chunk only."""
        if self.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return self.language.output_layer.weight

    def forward(self, batch: ModelInput) -> torch.Tensor:
        """Return hidden states [T, 1, hidden] (T / tp rows under sequence parallelism)."""
        if self.language.training != torch.is_grad_enabled():
            self.language.train(torch.is_grad_enabled())  # megatron-core recomputes in training mode only
        embeddings = self._embed(batch) if self.pre_process else None
        return self.language(
            input_ids=None,
            position_ids=batch.positions[:, None, :],
            attention_mask=None,
            decoder_input=embeddings,
            packed_seq_params=PackedAttention(attend=batch.attend),
        )

    def _embed(self, batch: ModelInput) -> torch.Tensor:
        x = self.language.embedding(input_ids=batch.token_ids[None], position_ids=None)  # [T, 1, H]
        if batch.images:
            features = batch.features or encode_images(self, batch.images)
            rows = torch.cat([features[i] for i in batch.image_order])
            assert batch.image_rows is not None and rows.shape[0] == batch.image_rows.shape[0]
            x = x.index_copy(0, batch.image_rows, rows[:, None, :].to(x.dtype))
        return scatter_to_sequence_parallel_region(x, group=self.mesh.tp_group) if self.mesh.sequence_parallel else x


def build_chunks(
    shape: VlmShape, mesh: Mesh, dtype: torch.dtype, recompute: RecomputeConfig, layers: Layers | None = None
) -> list[VlmModel]:
    """Build this pipeline stage's chunks, in the order in which a token meets them. Weights are not loaded.

    `layers` None are those of the torch spec.

    Raises:
        ValueError: the model cannot be cut as the mesh's layout says.
    """
    shape.check_layout(mesh.layout)
    recompute.check(mesh.layout.layers_by_chunk(shape.text.num_layers))
    return [VlmModel(shape, mesh, dtype, i, recompute, layers) for i in range(mesh.vp_size)]


def _mark_parallel_parameters(module: torch.nn.Module) -> None:
    """Say which parameters are split over the tensor-parallel group: gradient norms count the others once.

    megatron-core does so as it initialises weights, which we skip.
    """
    split_dim = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for child in module.modules():
        dim = split_dim.get(type(child))
        weight = child.weight if dim is not None else None
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


def encode_images(model: VlmModel, images: tuple[ImagePatches, ...]) -> list[torch.Tensor]:
    """Run the tower over unique images; first chunk only."""
    assert model.vision is not None
    return encode(model.vision, images, model.mesh)


def gather_hidden(model: VlmModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the last stage's hidden states whole, [T, H], ready for the vocabulary-parallel output layer.

    Backward sums the tensor-parallel ranks' gradients (each knows only its own part of the vocabulary).
    """
    if model.mesh.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=model.mesh.tp_group)[:, 0]
    return copy_to_tensor_model_parallel_region(hidden, group=model.mesh.tp_group)[:, 0]

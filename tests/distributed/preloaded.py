"""What every rank of a test imports, imported once, in the process that ranks are forked from."""

import gc

from megatron_vlmr1.runtime import device

device.prepare_megatron()

import torch._dynamo  # noqa: E402, F401 - by the first optimizer
from transformers import AutoTokenizer  # noqa: E402, F401

from megatron_vlmr1.train import grpo, sft  # noqa: E402, F401
from tests import jobs  # noqa: E402, F401
from tests.distributed import work  # noqa: E402, F401

gc.collect()
gc.freeze()  # which leaves the pages shared, too

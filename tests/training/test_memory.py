import dataclasses

import pytest

from gdn2_jax.models import DeltaRule, SoftmaxAttention
from gdn2_jax.parallel import MeshConfig, make_mesh
from gdn2_jax.timing import peak_gib
from gdn2_jax.training.memory import predict_memory
from gdn2_jax.training.step import compile_train_step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "remat", "unroll"),
    [
        (MeshConfig(fsdp=2, tensor=2, sequence=2), "full", False),
        (MeshConfig(fsdp=4), "elementwise", True),
    ],
    ids=str,
)
def test_prediction_is_within_15_percent_of_the_compiler(config, sizes, remat, unroll):
    changes = {"vocab_size": 1024, "d_model": 128, "num_layers": 4, "hybrid": True, "mlp_dim": 384}
    changes["mixer"] = DeltaRule(num_heads=2, head_dim=64)
    changes["attention"] = SoftmaxAttention(num_heads=2, window_size=64)
    model = dataclasses.replace(
        config.model, implementation="xla", remat=remat, unroll=unroll, **changes
    )
    data = dataclasses.replace(config.data, sequence_length=256)
    config = dataclasses.replace(config, model=model, data=data)
    mesh = make_mesh(sizes)
    compiled = peak_gib(compile_train_step(config, mesh)) * 2**30
    assert abs(sum(predict_memory(config, mesh)) / compiled - 1) < 0.15

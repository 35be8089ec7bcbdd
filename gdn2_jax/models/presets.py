"""Named model configurations."""

from gdn2_jax.models.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    # Trains on bytes in minutes on two CPU cores.
    "tiny": ModelConfig(
        vocab_size=257,
        d_model=128,
        num_layers=4,
        hybrid=True,
        num_heads=2,
        head_dim=64,
        attention_heads=2,
        window_size=128,
        mlp_dim=256,
        dtype="float32",
    ),
    "gdn2_100M": ModelConfig(d_model=768, num_layers=12, num_heads=12, head_dim=64, mlp_dim=2048),
    "gdn2_305M": ModelConfig(d_model=1024, num_layers=12, num_heads=16, head_dim=64, mlp_dim=4352),
    "swa_gdn2_100M": ModelConfig(
        d_model=768,
        num_layers=12,
        hybrid=True,
        num_heads=4,
        head_dim=64,
        attention_heads=12,
        mlp_dim=2048,
    ),
    # The paper's models; "1.3B" counts the blocks without embedding and head.
    "gdn2_1.3B": ModelConfig(d_model=2304, num_layers=18, mlp_dim=6208, remat="full"),
    "swa_gdn2_1.3B": ModelConfig(
        d_model=2304, num_layers=18, hybrid=True, mlp_dim=6784, remat="full"
    ),
}

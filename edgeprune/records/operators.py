"""The words for operators that a profile may use, and the traced names that each stands for."""

from __future__ import annotations

# Word of a profile -> operators of ``torch.export``, without ``aten.`` and the overload. A trailing underscore (in place) is dropped.
WORDS: dict[str, tuple[str, ...]] = {
    "adaptive_avg_pool": ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    "adaptive_max_pool": ("adaptive_max_pool2d",),
    "attention": ("scaled_dot_product_attention",),
    "avg_pool": ("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    "bicubic": ("upsample_bicubic2d",),
    "concat": ("cat", "concat", "concatenate"),
    "elu": ("elu",),
    "fft": ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft"),
    "fft2": ("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2"),
    "fftn": ("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn"),
    "fold": ("col2im",),
    "gelu": ("gelu",),
    "grid_sample": ("grid_sampler", "grid_sampler_2d"),
    "group_norm": ("group_norm",),
    "hard_sigmoid": ("hardsigmoid",),
    "hard_swish": ("hardswish",),
    "instance_norm": ("instance_norm",),
    "interpolate": (
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
        "upsample_bilinear2d", "upsample_trilinear3d",
    ),
    "layer_norm": ("layer_norm",),
    "leaky_relu": ("leaky_relu",),
    "log_softmax": ("log_softmax", "_log_softmax"),
    "matmul": ("matmul", "bmm", "mm", "baddbmm"),
    "max_pool": ("max_pool1d", "max_pool2d", "max_pool3d"),
    "max_unpool": ("max_unpool2d",),
    "mish": ("mish",),
    "permute": ("permute", "transpose"),
    "pixel_shuffle": ("pixel_shuffle", "pixel_unshuffle"),
    "prelu": ("prelu", "_prelu_kernel"),
    "sigmoid": ("sigmoid",),
    "silu": ("silu",),
    "softmax": ("softmax", "_softmax"),
    "tanh": ("tanh",),
    "transposed_conv": ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "unfold": ("im2col",),
}  # fmt: skip
_BY_TRACED = {name: word for word, names in WORDS.items() for name in names}


def word_of(traced: str) -> str | None:
    """The word for a traced operator, ``None`` for one that no profile can name.

    >>> word_of("aten.hardswish_.default"), word_of("aten.upsample_bilinear2d.vec"), word_of("aten.conv2d.default")
    ('hard_swish', 'interpolate', None)
    """
    name = traced.removeprefix("aten.").partition(".")[0]
    return _BY_TRACED.get(name) or _BY_TRACED.get(name.rstrip("_"))

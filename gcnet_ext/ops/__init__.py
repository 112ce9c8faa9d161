"""The operators, one module for each: its function, plain PyTorch, checks, shapes, gradients and FLOPs.

Source of the formulas: Y. Cao, J. Xu, S. Lin, F. Wei, H. Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and
Beyond", 2019, https://arxiv.org/abs/1904.11492 ("the paper" in these modules).

Shapes: N samples, C channels, one or more spatial dimensions, P positions (their product), H hidden units.
Dtypes: x is float16, bfloat16, float32 or float64. A residual has the dtype of x, valid is bool, and every weight, scale and
shift has the dtype of x or float32. Sums are taken in float32 (float64 for a float64 x). Under autocast x is never cast; 16-bit
weights beside a float32 x are cast to float32. x may have any strides; NCHW and channels_last are read as they are, anything
else is made contiguous once, and the output has the memory format of x.
"""

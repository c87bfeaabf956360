"""How a formula runs fast: one public op each, its torch reference and its kernels."""

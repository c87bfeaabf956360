"""How a formula runs fast: one public op each, its torch reference and its kernels.

Call ops through `benthic.kernels.ops`. Shape suffixes: T tokens, S sequences, D model, H query heads, d
query and key dim, v value dim, r rope dim, C kv latent, W = C + r, P pages, B tokens a page, Q queries a
sequence, E experts, K experts a token, R rows sorted by expert, I and O input and output width, V
vocabulary, F ffn width.
"""

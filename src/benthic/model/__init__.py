"""The network, once: MLA, DeepSeekMoE, MTP, and Hugging Face checkpoints."""

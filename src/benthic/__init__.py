"""Plan, train and serve language models of the DeepSeek-V3 architecture."""

__version__ = "0.1.0"

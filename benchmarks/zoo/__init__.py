"""A table of architectures and states of a model, from PyTorch to tokens (`python -m benchmarks.zoo`).

- `entries`: what an entry is, small models from transformers' configs, and the norms that are there
- `decoders`, `hybrids`, `encoder_decoders`, `multimodal`, `encoders`: architectures
- `states`: states of a model, and wrappers
- `libraries`: models of diffusers, timm, x-transformers and litgpt
- `catalog`: all entries
- `tokens`: greedy tokens of PyTorch and of an exported file
- `rows`: the steps of one entry
- `isolation`: each entry in a process of its own
- `table`: results as JSON, Markdown and a summary
- `run`: the command line
"""

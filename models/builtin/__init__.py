"""The models shipped with this package: a readable decoder, and a small checkpoint of it trained to add numbers.

decoder: Decoder and DecoderConfig, a decoder-only transformer; random_decoder, small_decoder.
checkpoint: save_decoder and load_decoder, a decoder on disk; addition, the shipped checkpoint.
addition_task: the task of the checkpoint: problems, solve, accuracy, torch_step.
train_addition: train, which makes the checkpoint; also a command.
"""

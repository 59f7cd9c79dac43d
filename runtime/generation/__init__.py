"""Generation of text with an exported decoder in ONNX Runtime or TensorRT.

api: `generate`, `generate_batch` and `Generator`, prompts to text.
decoder: `Decoder`, what gives the logits of the next tokens, and `TextDecoder`, an exported decoder.
parts: decoders of several models: an encoder and a decoder, or an encoder of images or sounds.
positions: the positions of the tokens of an image, in three axes.
open: `open_decoder`, the decoder of an exported folder or of an engine.
reader: `Reader`, which runs only the tokens that the cache of a decoder does not hold.
settings: how the next token is chosen and where a text ends, by transformers' names.
loop: transformers' loop over a decoder.
stream: the pieces of a text as soon as they are known.
"""

"""How a model is called: its arguments and results, what stands around it, and its parts.

calls: CallForm, flat named tensors as the arguments of a forward; named_tensors, the tensors of its result.
wrappers: look_through, the model inside DataParallel, torch.compile, PEFT and others.
parts: part_of, the parts of a model as modules of their own, such as an encoder and its decoder.
part: Part, what these modules have in common.
media_parts: FeaturesPart, EmbeddingPart and EmbedsDecoderPart, of a model that reads images or sounds beside text.
modalities: text_only_note, whether an export leaves out the images or sounds that a model reads.
example_inputs: example_inputs, token inputs for a model where the user gives none; vocabulary_size.
experts: experts, which implementation of mixture-of-experts layers runs.
rotary: reset_rotary and traceable_rotary, rotary embeddings whose frequencies follow the length.
"""

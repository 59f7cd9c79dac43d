"""Build, run, validate and report: everything that happens to a model after it has been exported.

runners: run a model in PyTorch or ONNX Runtime.
inputs: the inputs that a model runs on, generated or given by the user.
accuracy: errors against a float64 reference, and the rules that decide whether they pass.
norms: run and check the norms of a model one by one, and the segments between them.
attention: run and check the attentions of a file one by one.
validation: compare an exported model with PyTorch (`validate`, `bisect`).
rewriting: rewrite the norms of an .onnx file and prove the result (`rewrite_model`).
risk: find the norms that are at risk in float32, float16 or bfloat16 (`risk`).
engines: engines of TensorRT on disk and opened on a GPU.
tensorrt: build TensorRT engines (`build_engine`).
generation: text from an exported decoder (`generate`).
packaging: folders that servers run (`package_model`).
serving: serve a model over HTTP.
cluster: work on a cluster of Ray.
dataset: run a model on the rows of a data set (`run_dataset`).
recipe: export, validate and package the models of a recipe (`ship`).
report: write reports as HTML and JUnit XML, and compare two results.
doctor: what this machine can export, build and run (`examine`).
doctor_records: what it finds. doctor_looks: how it finds it. doctor_registry: what it asks in a process of its own.
doctor_tensorrt: what TensorRT and TensorRT-RTX can do here, what conflicts, and the target that suits this machine.
"""

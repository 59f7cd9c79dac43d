"""Serve models over HTTP, in the protocol that KServe and Triton Inference Server call version 2.

server: `Server`, which answers requests; `serve_folder` opens what it serves.
triton_backend: `TritonPythonModel`, a model in Triton's Python backend.
http_server: `HttpServer`, what servers have in common.
protocol: requests and answers: their JSON, and arrays as JSON or as bytes.
"""

"""What this machine allows, what the package reaches of it, and peers beside it: `ouro bench`.

`machine` measures the limits, `bounds` turns them into tokens per second for a model, `worker` and `candidates` measure this
package, PyTorch (`torch_forward`) and llama.cpp (`llama_cpp`, `gguf_file`) in turns, `batched` several requests at once,
`results` makes the table and the JSON line, `plot` the roofline, `command` the command line.
"""

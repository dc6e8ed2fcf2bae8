"""The Python runtime: ``llama_cpp.Llama`` on our build of llama.cpp, with native errors as exceptions."""

"""Files for other software that runs a fine-tuned model: vLLM, llama.cpp, ONNX and torch.export."""

{
  description = "gpu_rnn's Triton kernels for the kernels hub";
  inputs.kernels.url = "github:huggingface/kernels";
  outputs = { self, kernels }: kernels.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}

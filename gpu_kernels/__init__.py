"""LoRA kernels over paged weights, each beside the torch reference that defines it."""

if __name__ != "segue.gpu_kernels":
    raise ImportError("this folder is the package segue.gpu_kernels: import it as segue.gpu_kernels")

"""Kernels compiled ahead of time, for any card and on any machine: no GPU and no driver are needed.

`releases.RELEASES` names the kernels in the forms that are released; `compiling.compile_release` makes PTX and a cubin
of one for a compute capability; `binary` reads back what the compiler made of it; `ptx` makes PTX fit for other
runtimes, such as a TensorRT plugin. `python -m tdm_kernels.aot` does all of it from a shell. A process with
TRITON_INTERPRET=1 cannot compile.
"""

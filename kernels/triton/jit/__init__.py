"""The device code. Importing a module of these needs triton; all else about its kernels stands beside this folder."""

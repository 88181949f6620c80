"""Norm, SwiGLU and paged tree attention on the CPU in one C++ kernel, built where it runs."""

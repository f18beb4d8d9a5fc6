"""The kernel's interfaces that Python has no module for, by raw system calls."""

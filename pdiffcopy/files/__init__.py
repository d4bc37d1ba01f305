"""
How are files read and written on this machine?

Everything here knows the kernel and nothing of requests: names and confinement, open files, claims, buffers, sockets.
"""

"""
How fast is pdiffcopy, next to rsync and next to what the machine can do?

Run it with ``make benchmark`` or ``python -m benchmarks`` (``--help`` explains). It needs Linux, and rsync for the
comparison. From the top down:

:mod:`.__main__`
    options in; tables, JSON and SVG out
:mod:`.groups`
    what is measured: each group is a list of cases and how each of them is prepared
:mod:`.verdicts`
    which ratios of medians are promised, and which of them hold
:mod:`.growth`
    how time grows with size and delta, and how much work a GiB is
:mod:`.bench`
    the one way to measure a case: prepare, start, wait, check
:mod:`.contenders`
    the command lines that compete
:mod:`.many`, :mod:`.sparse`, :mod:`.trees`, :mod:`.disks`
    the groups with many files and with holes, the folders and file systems that they take
:mod:`.files`, :mod:`.servers`, :mod:`.links`, :mod:`.processes`
    files to compare, servers to ask, wires between them, and what processes use up
:mod:`.limits`, :mod:`.readers`, :mod:`.relay`, :mod:`.slowfs`
    programs of their own: the work done as barely as possible, a wire and a file system that delay
:mod:`.table`, :mod:`.svg`
    how the numbers are shown
"""

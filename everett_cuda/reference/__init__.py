"""The readable truth: stream law 1 in plain numpy, slow and independent of the C++. Every other implementation is
compared with this one bit for bit. A record is the 12-word subkey record, a numpy array uint32[12]."""

LAW_VERSION = 1

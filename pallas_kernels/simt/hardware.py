"""Facts of the chip that the kernels are written for: Hopper (sm90), as in an H100 SXM or an H200.

Every other module takes these numbers from here.
"""

H100_SMS = 132  # streaming multiprocessors (SMs) of an H100 SXM; an H200 has the same number
WARP = 32  # threads of a warp
WARPS = 4  # warps of a warpgroup
LANES = WARPS * WARP  # threads of a warpgroup
SMEM_BYTES = 227 * 1024  # shared memory that one thread block may use
SM_REGISTERS = 65536  # 32-bit registers of an SM, shared by all threads that run on it
# One load or store of a thread moves at most this many bytes, and the copy engine (TMA) moves rows in multiples of it.
PIECE_BYTES = 16
SWIZZLE_BYTES = 128  # widest swizzle of shared memory: 16-byte pieces are permuted within spans of this size
WGMMA_ROWS = 64  # rows of the result of one wgmma, the tensor core instruction of a warpgroup
MAX_GRID_AXIS = 2**16 - 1  # the most thread blocks along the second or third axis of a CUDA grid

"""Facts of the chip that the kernels are written for: Hopper (sm90), as in an H100 SXM or an H200."""

H100_SMS = 132  # streaming multiprocessors (SMs), of an H200 too
WARP = 32  # threads
WARPS = 4  # warps of a warpgroup
LANES = WARPS * WARP  # threads of a warpgroup
SMEM_BYTES = 227 * 1024  # shared memory that one block may use
SM_REGISTERS = 65536  # 32-bit registers of an SM, for the threads of all its blocks
# The most that one load or store of a thread moves, and the least that the copy engine (TMA) moves of a row.
PIECE_BYTES = 16
SWIZZLE_BYTES = 128  # rows of a wgmma operand in shared memory: the widest span within which pieces are permuted
WGMMA_ROWS = 64  # rows of one wgmma's result
MAX_GRID_AXIS = 2**16 - 1  # blocks along CUDA's second and third grid axes

#include "glue.h"

#include "../../../csrc/cuda/channel_fuse.cu"

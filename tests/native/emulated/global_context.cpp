#include "glue.h"

#include "../../../csrc/cuda/global_context.cu"

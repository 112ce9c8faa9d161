#include "glue.h"

#include "../../../csrc/cuda/attention_pool.cu"

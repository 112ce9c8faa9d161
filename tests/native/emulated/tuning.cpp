#include "glue.h"

#include "../../../csrc/cuda/tuning.cu"

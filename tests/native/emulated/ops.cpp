#include "glue.h"

#include "../../../csrc/ops.cpp"

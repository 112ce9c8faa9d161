// From here to end_target.h functions are compiled for the processors of GCNET_TARGET.
//
// What other files include, too, is included before: the linker keeps one copy of an inline function for the whole program, and
// a copy that was compiled here would not run on every processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "types.h"

#define GCNET_EXPANDED_PRAGMA(text) _Pragma(#text)
#define GCNET_PRAGMA(text) GCNET_EXPANDED_PRAGMA(text)
#if defined(__clang__)
GCNET_PRAGMA(clang attribute push(__attribute__((target(GCNET_TARGET))), apply_to = function))
#else
#pragma GCC push_options
GCNET_PRAGMA(GCC target(GCNET_TARGET))
#endif

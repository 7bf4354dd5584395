// What clean builds compile once for all tests (tests/CMakeLists.txt). Nothing of ours: a changed header must not rebuild all.
#pragma once

#include "tests/support/check_macro.h"

#include <ATen/ATen.h>

// Included before everything else in every test: LibTorch's logging header defines CHECK too, and whichever header comes last
// would win. Here LibTorch's comes first and is undone, so CHECK is Catch2's.
#pragma once

#include <c10/util/Logging.h>

#undef CHECK

#include <catch2/catch_test_macros.hpp>

// Depthwise convolutions, 3x3 and 5x5.
#pragma once

#include "depthwise_backward.h"
#include "depthwise_forward.h"

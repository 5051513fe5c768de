// Depthwise 3x3 convolutions.
#pragma once

#include "depthwise_backward.h"
#include "depthwise_forward.h"

#pragma once

namespace rftcore::cuda {

// What keeps the runtime linked in here from any device, such as a driver older than it; else nothing.
const char* why_no_device();

}  // namespace rftcore::cuda

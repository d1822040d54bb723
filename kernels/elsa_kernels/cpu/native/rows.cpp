// Rows of bytes into a file, many in one call: Python's lock is taken between none of them.
#include <cerrno>
#include <cstdint>
#include <unistd.h>

extern "C" {

// Row i goes from source + i · source_stride to the file's byte at + i · stride. 0, or the errno of what failed.
int elsa_write_rows(int file, const char *source, int64_t source_stride, int64_t at, int64_t stride, int64_t bytes,
                    int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        const char *from = source + row * source_stride;
        for (int64_t done = 0; done < bytes;) {
            const ssize_t n = pwrite(file, from + done, bytes - done, at + row * stride + done);
            if (n < 0 && errno != EINTR) return errno;
            if (n > 0) done += n;
        }
    }
    return 0;
}
}

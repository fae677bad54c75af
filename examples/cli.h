/* cli.h - what the command lines of the examples and benches share. Define CLI_PROGRAM, the name
   that errors begin with, before the include. */
#ifndef CLI_H
#define CLI_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static inline void die(const char *format, ...) {
  va_list list;
  va_start(list, format);
  fputs(CLI_PROGRAM ": ", stderr);
  vfprintf(stderr, format, list);
  fputc('\n', stderr);
  va_end(list);
  exit(1);
}

static inline int number(const char *text, int low, int high) {
  char *end;
  long value = strtol(text, &end, 10);
  if (*end || end == text || value < low || value > high)
    die("'%s' is not a number from %d to %d", text, low, high);
  return (int)value;
}

/* The file as named, or where it lies when the program is started from elsewhere. */
static inline const char *locate(const char *name, const char *elsewhere) {
  FILE *file = fopen(name, "rb");
  if (file) fclose(file);
  return file ? name : elsewhere;
}

#endif /* CLI_H */

// What candle calls of cuRAND when it makes a device. Numbers that titan draws are drawn on the host.
extern "C" {

static int generator;

int curandCreateGenerator(void** made, int) { return *made = &generator, 0; }
int curandDestroyGenerator(void*) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }
int curandSetGeneratorOffset(void*, unsigned long long) { return 0; }
int curandSetStream(void*, void*) { return 0; }

} // extern "C"

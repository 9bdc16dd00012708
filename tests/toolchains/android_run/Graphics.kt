// See Android.kt. A bitmap is its pixels; scaling to another size is not what is tested, and refused.
package android.graphics

class Bitmap(val width: Int, val height: Int, private val pixels: IntArray) {
    fun getPixel(x: Int, y: Int) = pixels[y * width + x]

    companion object {
        @JvmStatic
        fun createScaledBitmap(source: Bitmap, width: Int, height: Int, filter: Boolean): Bitmap {
            require(filter && source.width == width && source.height == height)
            return source
        }
    }
}

object Color {
    @JvmStatic fun red(color: Int) = color shr 16 and 255
    @JvmStatic fun green(color: Int) = color shr 8 and 255
    @JvmStatic fun blue(color: Int) = color and 255
}

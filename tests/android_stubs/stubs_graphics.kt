package android.graphics

class Bitmap {
    fun getPixel(x: Int, y: Int): Int = TODO("$x $y")

    companion object {
        @JvmStatic
        fun createScaledBitmap(source: Bitmap, width: Int, height: Int, filter: Boolean): Bitmap =
            TODO("$source $width $height $filter")
    }
}

object Color {
    @JvmStatic fun red(color: Int): Int = TODO("$color")
    @JvmStatic fun green(color: Int): Int = TODO("$color")
    @JvmStatic fun blue(color: Int): Int = TODO("$color")
}
